"""Benchmarks: what Holdfast costs and gives, in numbers that another machine can repeat.

`report` is how each of them reports, `load` what is sent and when. The rest are programs, `python -m benchmarks.<name>`,
described in README.md beside this file. They measure the checkout they lie in; nothing imports them.
"""
