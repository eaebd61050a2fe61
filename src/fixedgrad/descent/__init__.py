"""The outer loop that descends by what it knows."""

from .descent import descent as descent
from .info import DescentInfo as DescentInfo
