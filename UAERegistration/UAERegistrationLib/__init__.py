"""Parameters, logic and widget of the module UAERegistration."""
