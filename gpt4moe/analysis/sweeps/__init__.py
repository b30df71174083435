"""The report of a sweep: a page, pictures and tables of numbers, made of the files in its folder."""
