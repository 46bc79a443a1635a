"""The classes that verl calls. They import verl, so nothing else may import them."""
