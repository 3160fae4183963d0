"""What the report says of each kind of stage; ``page.py`` first."""
