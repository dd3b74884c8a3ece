"""Our numbers beside the alternatives, measured in one run on one machine: only their ratios need be trusted."""
