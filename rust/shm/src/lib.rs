//! Mappings, the copy function and the system calls of ivsmc.
