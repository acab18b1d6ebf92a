"""What the modules share on the Slicer side: nodes and files, the child process, the offer of torch, sample data."""
