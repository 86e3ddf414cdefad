// Package inflate reads gzip files faster than the libraries there are for Go, and can start in the
// middle of them.
package inflate
