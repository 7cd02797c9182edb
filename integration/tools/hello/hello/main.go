// Command hello reads itself and an authority's certificate, as a service that has nothing but these two in its image does.
package main

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
)

// Where Go's own x509 package looks for authorities.
const certificates = "/etc/ssl/certs/ca-certificates.crt"

func main() {
	program, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		fail(err)
	}
	text, err := os.ReadFile(certificates)
	if err != nil {
		fail(err)
	}
	block, _ := pem.Decode(text)
	if block == nil {
		fail(fmt.Errorf("%s holds no certificate", certificates))
	}
	if _, err := x509.ParseCertificate(block.Bytes); err != nil {
		fail(err)
	}
	fmt.Printf("hello %x\n", sha256.Sum256(program))
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "hello:", err)
	os.Exit(1)
}
