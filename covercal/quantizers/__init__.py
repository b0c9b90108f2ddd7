"""Pure mathematics on one linear layer: a weight matrix and a Gram matrix in, codes out."""
