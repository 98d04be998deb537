"""What became of runs, from what they left in their output folders: `holdfast report`. No model is loaded.

`run` reads a run, `healthy` says which values are healthy, `findings` what is to be said of this run, `answers` answer
four questions in plain words. `panels` say which curves belong together; `page`, `picture` and `numbers_file` show all
of it as HTML, PNG and JSON, and `live` writes the page anew while a run trains. Numbers are those that were logged:
nothing is computed again.
"""
