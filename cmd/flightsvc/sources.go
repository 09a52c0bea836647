package main

// The stores that models may come from. modelcache reads them through gocloud.dev/blob, which finds them by the scheme
// of a URI.
import (
	_ "gocloud.dev/blob/azureblob" // azblob://container/path
	_ "gocloud.dev/blob/gcsblob"   // gs://bucket/path
	_ "gocloud.dev/blob/s3blob"    // s3://bucket/path
)
