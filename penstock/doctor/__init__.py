"""`penstock doctor`: what this machine has and lacks for serving, a verdict and a remedy a line.

Facts are gathered by probes.py, judged by verdicts.py (pure), printed by command.py.
"""
