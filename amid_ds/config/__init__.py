"""The user's settings as values: the recipe, its schedules and the packaged recipes."""
