"""The graph, its levels and how it may be changed.

model_graph.py  ModelGraph: FX graph + weight recipes + state specs
levels.py       CAPTURED, CANONICAL, CACHED, LOWERED
verify.py       verify(graph, level): what each level means, executable
transform.py    Transform, Stage, Pipeline and what they report
report.py       BuildReport
text.py         graphs as text, and the difference between two
"""
