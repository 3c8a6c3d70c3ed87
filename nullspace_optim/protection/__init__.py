"""Protection of one optimizer step: hide, correct, restore."""
