"""Where a step's time goes: a deployed model and a load in; a trace, and a table of ops against limits out.

watch.py      sees the lowered graph of a build, and every step that its program serves
op_by_op.py   runs a step's ops one by one and times each
trace.py      what a profiler's trace says: which kernel was launched by which step or op, and from a graph or not
timeline.py   spans of work -> how busy, and where the gaps are
table.py      times and costs -> rows, and rows -> text
run.py        the whole: load, measure, trace, write
"""
