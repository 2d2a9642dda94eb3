"""The proof that the Triton kernels are right: on a GPU by `batchnorm check-gpu`, anywhere by Triton's interpreter.

cases       what is computed: shapes, layouts, dtypes, activations, operands
bands       tensors between bands of NaN, so that what is read or written outside of them is seen
values      a case beside float64
bits        the same bits in every run, and under graph replay
command     all of it, in a table and a file
"""
