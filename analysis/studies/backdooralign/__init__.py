"""The studies of `analyze backdooralign`: the paper's arms, and grids of trainings."""
