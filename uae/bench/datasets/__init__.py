"""Public data in the layouts in which they are published, read into pairs with points and labels in patient mm."""
