"""A fuzzer over every public function: `make fuzz`, or `python tests/fuzz --case 123` for one case again.

A case is wholly determined by one integer. `draw` makes its tensors, the family modules (`similarities`, `losses`, …)
its call and the float64 oracle beside it, `judges` compares the two, `rounding` says how far apart they may lie, `loop`
runs cases until told to stop. Nothing judges a result by the code that made it.
"""
