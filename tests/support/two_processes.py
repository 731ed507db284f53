"""Rows and sizes for runs with two processes."""

from support.trainers import join_rows, make_rows

PROCESSES, STEPS = 2, 10

# 17 rows, 8 per step: the third and last step of an epoch has one row, so one of two processes has none.
LENGTHS = [(3, 1), (2, 20), (5, 2), (1, 9), (7, 1), (4, 3), (2, 14), (6, 5), (9, 1), (1, 1), (3, 17), (2, 2)]

ROWS = make_rows([*LENGTHS, (8, 4), (2, 11), (1, 3), (5, 6), (4, 1)])

HELD_OUT = make_rows([(3, 9), (2, 12), (4, 1), (1, 5), (6, 2)], seed=4)

# The same rows as conversations of one to four sequences.
CONVERSATIONS = {"rows": join_rows(ROWS, [2, 1, 4, 1, 2, 1, 2, 1, 3]), "held_out": join_rows(HELD_OUT, [2, 1, 2])}
