"""Does a run fit: memory, network and time of a step, from a recipe and its models' configs."""
