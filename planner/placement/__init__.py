"""LayerGraph + Hardware + Workload → placements, by counting alike layers. The only room that knows ortools."""
