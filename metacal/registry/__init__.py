"""Every method in one table: what it estimates, what it gets wrong, what it costs, and how it is made.

`metacal methods` prints the table of the README; `metacal methods --write README.md` writes it there.
"""

from metacal.registry.row import FAMILIES as FAMILIES
from metacal.registry.row import Family as Family
from metacal.registry.row import Kind as Kind
from metacal.registry.row import Method as Method
from metacal.registry.row import Setting as Setting
from metacal.registry.row import Sizes as Sizes
from metacal.registry.table import METHODS as METHODS
from metacal.registry.table import markdown_table as markdown_table
from metacal.registry.table import method as method
from metacal.registry.table import written as written
