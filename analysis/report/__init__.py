"""Run folders and the HTML report that is built from them."""
