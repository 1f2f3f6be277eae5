"""What a text must obey: schemas, tools, patterns, grammars, and the walk along a canvas that keeps to them."""
