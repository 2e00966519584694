"""How tuned weights are made: an attacker's recipes and a defender's, on TRL and PEFT (extra `train`).

`recipes` says what each kind of training shows the model; `trainer` does it. A new recipe is one row.
"""
