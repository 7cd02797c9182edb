// The program of the tests' static Go image: built by ../build.sh, put into an image by ../../src/image/real.rs.
module drover/integration/tools/hello

go 1.26.8
