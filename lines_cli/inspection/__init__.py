"""What `lines inspect` tells: headers, what changed, how changes interfere; as text, HTML and pictures."""
