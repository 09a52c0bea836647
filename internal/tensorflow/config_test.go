package tensorflow

import (
	"encoding/hex"
	"testing"
)

// TestConfig compares with what TensorFlow's own ConfigProto says, in Python:
//
//	c = tf.compat.v1.ConfigProto(intra_op_parallelism_threads=2, inter_op_parallelism_threads=3,
//	                             use_per_session_threads=True)
//	c.gpu_options.allow_growth = True
//	c.gpu_options.experimental.virtual_devices.add(memory_limit_mb=[2048])
//	c.SerializeToString(deterministic=True).hex()
func TestConfig(t *testing.T) {
	for want, options := range map[string]Options{
		"":             {},
		"100228034801": {IntraOpThreads: 2, InterOpThreads: 3},
		"32022001":     {GrowDevice: true},
		"10022803320c20014a080a060a04000000454801": {IntraOpThreads: 2, InterOpThreads: 3, GrowDevice: true,
			DeviceMiB: 2048},
	} {
		if got := hex.EncodeToString(options.config()); got != want {
			t.Errorf("%+v is %s, want %s", options, got, want)
		}
	}
}

func TestTooOld(t *testing.T) {
	for version, want := range map[string]bool{
		"1.15.5": true, "2.18.1": true, "2.19.0": false, "2.19.0-rc1": false, "2.21.0": false, "3.0.0": false,
		"dev": false, Version(): false,
	} {
		if TooOld(version) != want {
			t.Errorf("TooOld(%q) is not %v", version, want)
		}
	}
}
