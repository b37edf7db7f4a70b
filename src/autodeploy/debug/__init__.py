"""Looking inside: checks of a finished program, and graphs as text at any level.

isolation.py  packed sequences must give what each gives alone
inspect.py    the graph of a model at any level
"""
