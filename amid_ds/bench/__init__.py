"""Our numbers beside the alternatives, measured in one run on one machine, so that only their ratios need be trusted."""
