"""What only a canvas can do: templates with slots, and the plans that fill, edit and decide."""
