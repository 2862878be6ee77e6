"""Studies: a grid of runs over objectives, methods, data sets and seeds, and what it shows."""

from metacal.study.analysis import TRANSFER as TRANSFER
from metacal.study.analysis import Comparison as Comparison
from metacal.study.analysis import Correlation as Correlation
from metacal.study.analysis import Finding as Finding
from metacal.study.analysis import compare as compare
from metacal.study.analysis import correlate as correlate
from metacal.study.analysis import findings as findings
from metacal.study.analysis import overall as overall
from metacal.study.page import differences as differences
from metacal.study.page import markdown as markdown
from metacal.study.page import page as page
from metacal.study.page import picture as picture
from metacal.study.page import scores as scores
from metacal.study.plan import Cell as Cell
from metacal.study.plan import Study as Study
from metacal.study.plan import cells as cells
from metacal.study.plan import load_study as load_study
from metacal.study.records import write_records as write_records
from metacal.study.runner import run as run
