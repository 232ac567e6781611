"""`orchestrate advise`: measures pairs under the initial model and writes advice into the sweep file."""
