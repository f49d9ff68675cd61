"""Recipes: the schema, and loading, overriding and saving recipe files."""

from slotmamba.config.errors import RecipeError
from slotmamba.config.loading import installed_recipes, load_recipe, recipe_content, recipe_yaml, save_recipe
from slotmamba.config.schema import ModelConfig, Recipe

__all__ = [
    "ModelConfig",
    "Recipe",
    "RecipeError",
    "installed_recipes",
    "load_recipe",
    "recipe_content",
    "recipe_yaml",
    "save_recipe",
]
