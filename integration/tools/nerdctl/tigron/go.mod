// Stands in for nerdctl's own helper module for tests, which is not published: the command does not use it.
module github.com/containerd/nerdctl/mod/tigron

go 1.26.8
