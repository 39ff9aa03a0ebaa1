"""The command `tl-nodeprune`: arguments in, words or JSON out.

Nothing is imported here: `shell` comes before the imports that take seconds.

main      the subcommands demo, show and prune, and all arguments
commands  evaluate, report, explain, compare and rank
inputs    the model, the prompts and the files that a command line names
output    what they print, in words and as JSON
shell     an end without a traceback: Ctrl-C, a closed pipe, a wrong argument
"""
