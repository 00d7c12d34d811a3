"""The frameworks whose recipes hvdtrain trains, one file each; none is imported before a recipe needs it."""
