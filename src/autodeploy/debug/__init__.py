"""Looking inside: checks of models and programs, and graphs as text at any level.

check.py             every step of a build against the model's own code, on a tiny clone (clone.py)
shrink.py            the tiny config and the random model of it (shrink_layers.py, shrink_sizes.py)
full_check.py        the real build on real weights against transformers' own run of them (original.py, texts.py)
isolation.py         packed sequences must give what each gives alone
inspect.py           what a build makes of a model without its weights: the graph at any level, each change to it
page.py              that as an HTML page (layers.py: kinds of layers; costs.py: operations, bytes, least times)
graph_run.py         a graph at any level, run with its weights, every node's value kept
packed_run.py        single steps by hand, without a scheduler
compare.py first_difference.py    how far two results are apart, and where they part (agreement.py: along a text)
check_report.py check_table.py    what a check found, as data and as a table; full_report.py and full_table.py of a full
                                  one, report_json.py of both
"""
