"""What the user asks for, as values: the recipe, its schedules and the packaged recipes."""
