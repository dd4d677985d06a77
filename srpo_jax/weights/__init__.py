"""Tables and an engine that translate other projects' weight files to our parameter paths and back."""
