from slotmamba.config.schema import Recipe
