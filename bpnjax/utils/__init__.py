"""What every part of the package uses: errors, random keys, heads."""
