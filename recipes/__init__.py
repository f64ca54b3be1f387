"""The recipes, imported as `lion_lightning.recipes` from a checkout and from a wheel alike."""

if __name__ == "recipes":  # each class would exist twice
    raise ImportError("this folder is the package lion_lightning.recipes: import that")
