"""What a computation costs."""

from metacal.diagnostics.cost import peak_bytes as peak_bytes
from metacal.diagnostics.cost import work as work
