"""Fine-tuning with an attacker's and a defender's recipes, based on TRL and PEFT (extra `train`).

`recipes` defines the training examples of each recipe; `trainer` trains on them. A new recipe is one row.
"""
