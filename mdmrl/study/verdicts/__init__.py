"""The verdict rules, second edition, written before the runs they judge: `ROWS` are the claims that
are judged, each with its rule and its lines; all else that the study measures has no verdict."""

from mdmrl.study.verdicts import inference, learning
from mdmrl.study.verdicts.rules import Verdict, interval_of
from mdmrl.study.verdicts.table import ROWS, Row, row_of
