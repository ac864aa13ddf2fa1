"""BOP datasets: reading them, estimating the poses they ask for, and the csv of the BOP Challenge."""
