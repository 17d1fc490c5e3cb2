"""From routing records and training logs to metrics, figures and a report. Needs neither a GPU nor the model."""

from libmoe_fast.analysis.counts import RoutingCounts
from libmoe_fast.analysis.metrics import layer_entropy, load_imbalance, total_entropy

__all__ = ["RoutingCounts", "layer_entropy", "load_imbalance", "total_entropy"]
