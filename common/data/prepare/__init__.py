"""Making data sets: from any form to any other, from ImageNet's archives, and proof that what was made is whole."""
