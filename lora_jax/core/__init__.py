"""What everything else meets in. Imports nothing of the library but itself.

axes         the axes of a weight: stacked matrices, inputs, outputs. Start here
adapter      `Rule` and `Adapter`: what the user writes, the arrays of one weight; the registry of kinds
operand      an adapter as a traced program uses it; wrappers around operands
layout       which of a weight's axes each array has
products     one use of a weight, reduced to y = x @ W; the thin products x @ A and h @ B
convolutions uses that are no plain matrix product
targets      what a plan says of each weight
packed       frozen weights of fewer bits, as nodes of a tree; `deferred`: what a program did to one, done later;
             `no_array`: what one says where it is taken for an array
paths        names for the leaves of any tree; `patterns`: the first matching rule wins
argument_checks, adapter_checks    what a call is given: one error that names it, what is expected, and the order
partition    partition specs: their entries, and whether a shape can be split so
arrays, text, errors, _compat, version    facts about arrays, tables, the one exception, JAX's versions, our own
"""
